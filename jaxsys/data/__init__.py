"""Token streams that resume exactly and split over processes."""
