"""One folder per foreign framework; each is imported only when it is asked for, and none imports another."""
