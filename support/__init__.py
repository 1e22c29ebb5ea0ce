"""What the five modules lean on (files, HTTP, cache, statistics, the report's page, ...)."""
