"""Reads interaction logs and item tables of many formats, checks every row, and names the bad ones."""
