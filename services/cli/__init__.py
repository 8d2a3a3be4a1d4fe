"""The `interlock` command. One module a command group, imported when it is called: each starts fast."""
