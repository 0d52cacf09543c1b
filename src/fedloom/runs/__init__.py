"""One run: what it is asked (`spec`), made of (`parts`), how it goes (`experiment`), what it leaves (`record`)."""
