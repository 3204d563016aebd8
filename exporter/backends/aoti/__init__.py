"""AOTInductor engines."""
