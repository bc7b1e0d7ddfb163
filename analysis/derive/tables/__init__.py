"""Tables and logs from elsewhere as series."""
