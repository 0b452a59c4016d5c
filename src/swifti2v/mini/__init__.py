"""The embedded model `mini`: its recipes, codecs and objectives."""
