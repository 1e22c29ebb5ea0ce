"""One question per file and one command each (`python -m studies.csr --help`); see README.md."""
