"""One file per command: the function that the library and the command line share."""
