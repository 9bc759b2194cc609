"""What each command of the command line does: the rooms of the library, put together."""
