"""`wisp bench stream`: one stream through the whole suite, drafts against plain decoding and transformers."""
