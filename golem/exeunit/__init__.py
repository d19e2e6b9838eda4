"""The exe-unit: one supervisor process per activity, which runs what the requestor asks for inside a runtime."""
