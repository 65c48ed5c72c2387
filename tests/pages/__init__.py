"""Commands and snippets of the documentation run, with real parts."""
