"""What a user starts: the command line, the notebook runner, the report."""
