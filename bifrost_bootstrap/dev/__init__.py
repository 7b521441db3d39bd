"""For development: embedded servers, and loading modules from a folder."""
