"""HTTP routes, one module per subject: they read a request, ask the parts, shape an answer."""
