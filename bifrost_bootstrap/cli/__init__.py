"""The command line: commands, their outcome as exit code, and what they print."""
