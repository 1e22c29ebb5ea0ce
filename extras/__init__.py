"""What the method can be understood without: HTTP, the report's page, the memory plan."""
