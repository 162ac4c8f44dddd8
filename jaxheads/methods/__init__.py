"""Published methods, one file each, thin over the rooms below."""
