"""One config, several variants of it: trained (or one checkpoint evaluated) and put into one table."""
