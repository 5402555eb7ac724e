"""How the project's tables and pictures look, and what a report says of where it was made."""
