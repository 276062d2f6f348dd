"""Other people's front doors: their calls, on thinwire's collectives, codes and synchronisation. Imported when asked for only."""
