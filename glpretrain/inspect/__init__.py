"""Pictures of what an encoder sees, drawn from an exported backbone."""
