"""What a person looks at: a model's units and graphs as data, routes of a text, pages and plots."""
