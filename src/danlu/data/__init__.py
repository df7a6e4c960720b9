"""From a pile of files to a data folder: reading, cleaning, deduplicating, splitting, tokenising, mining."""
