"""`nsphere bench`: one module per question, each printing a table and, with --json, writing the machine too."""
