"""What people look at: figures (`figures`) and one page that needs nothing else (`html`)."""
