"""Commands of the console program, a file each; `dmc.cli` lists them."""
