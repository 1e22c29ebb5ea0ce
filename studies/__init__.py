"""One question a file and one command each (`python -m studies.csr --help`); see README.md."""
