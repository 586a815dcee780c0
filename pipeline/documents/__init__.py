"""Documents out of the files of a corpus: what all forms share in `base`, and one module a form."""
