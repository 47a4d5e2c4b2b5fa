"""Two vLLM engines inside a trainer's process: one samples the student, one scores with the teacher."""
