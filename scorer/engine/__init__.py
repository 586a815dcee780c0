"""Parts of scoring that are written for speed."""
