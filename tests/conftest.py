"""Being here, this file lets tests in any folder import the helpers of this one (`golden`)."""
