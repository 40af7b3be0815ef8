"""What runs have left behind, made visible: in the browser (`page`), in the terminal (`terminal`), in tables (`compare`)."""
