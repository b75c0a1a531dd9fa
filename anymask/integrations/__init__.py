"""anymask inside other libraries: one file for each, imported by name, so that none is needed until it is used."""
