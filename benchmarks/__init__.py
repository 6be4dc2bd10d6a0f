"""What fastmeta costs beside what users have today. See README.md."""
