"""Where runs are kept, and the files of other tools that are read into it."""
