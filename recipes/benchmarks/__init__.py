"""Side by side with what people use: each benchmark is a module with contenders that `mmpre bench` runs in turn."""
