"""How models write tool calls and reasoning: one description of a format gives its grammar and its parser."""
