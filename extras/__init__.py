"""What the method can be understood without: see the table in README.md, "Read it"."""
