"""Training: the ALM, and masked LMs whose masks follow a scored corpus. Nothing here needs Beam."""
