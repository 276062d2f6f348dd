"""The command line: parse first, import after. No command imports torch before it is called."""
