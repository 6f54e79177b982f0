"""Quality against bytes: tasks, scoring, a store that resumes, tables and plots."""
