"""Links between workers: ordered frames over Unix sockets or TCP."""
