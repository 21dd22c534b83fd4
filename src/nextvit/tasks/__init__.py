"""What a task is made of: its loss, the decoding of its outputs, its typed result."""
