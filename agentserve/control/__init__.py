"""What a model may say and how it writes it: tool schemas and the formats of tool calls."""
