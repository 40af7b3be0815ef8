"""What runs have left behind, made visible: a page for the browser, shaded text for the terminal, tables."""
