"""The gateway's decisions: the life of a request, validation, text. Pure; knows no clock and no wire."""
