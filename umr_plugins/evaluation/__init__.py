"""How good retrieval is: measures as pure functions."""
