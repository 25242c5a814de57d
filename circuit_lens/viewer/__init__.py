"""Pictures of attribution graphs."""
