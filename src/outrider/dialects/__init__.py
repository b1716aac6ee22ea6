"""How chat models write tool calls and thinking: recognised from a template, read from text, written as grammars. Text only."""
