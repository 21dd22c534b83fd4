"""Necks and heads of the dense tasks: maps in, outputs out. They know no backbone."""
