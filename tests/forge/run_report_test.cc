#include "forge/run_report.h"

#include <string>

#include "support.h"

using namespace moru;

TEST_CASE("a run's log becomes one page with a chart for every column, and nothing beside it") {
  const TempDir dir;
  std::string log = "{\"step\":0,\"val_loss\":3.0}\n";
  for (int i = 1; i <= 2000; ++i)
    log += "{\"step\":" + std::to_string(i) + ",\"epoch\":0.1,\"loss\":" + std::to_string(3.0 / i) +
           ",\"num_tokens\":" + std::to_string(100 * i) +
           ",\"lr\":0.0001,\"grad_norm\":null,\"rewards/margins\":" + std::to_string(-0.001 * i) +
           (i % 400 == 7 ? ",\"skipped\":true" : "") + "}\n";
  log +=
      "{\"step\":1000,\"val_loss\":1.25}\n"
      "{\"step\":2000,\"val_loss\":1.5,\"val_rewards/margins\":-1.5}\n"
      "{\"step\":2000,\"sample\":{\"prompt\":\"<b>Q</b>\",\"answer\":\"모루\"}}\n"
      "{\"step\":2001,\"lo";  // killed while it wrote
  dir.file("log.jsonl", log);
  const std::string page = run_report_html(dir.path());
  for (const char* part :
       {"<h2>Loss</h2>", "<h2>Learning rate</h2>", "<h2>rewards/margins</h2>",
        "Under way: 2000 steps", "<dd>1.2500<small>best, at step 1000; 3.0000 before</small>",
        ">1e-4<", "&lt;b&gt;Q&lt;/b&gt;", "모루",
        "<dt>steps skipped</dt><dd>5<small>outliers: step 7, 407, 807, 1207 …</small>"}) {
    CAPTURE(part);
    CHECK(page.find(part) != std::string::npos);
  }
  CHECK(page.find("<h2>Gradient norm</h2>") == std::string::npos);  // it has no numbers
  CHECK(page.find("num_tokens") == std::string::npos);
  // Validation stands in the chart of what it validates, wide and narrow.
  CHECK(page.find("<h2>val_") == std::string::npos);
  size_t validations = 0;
  for (size_t at = 0; (at = page.find(">validation<", at)) != std::string::npos; ++at)
    ++validations;
  CHECK(validations == 4);
  for (const char* part : {"://", "src=", "href="}) CHECK(page.find(part) == std::string::npos);
  CHECK(page.find("nan") == std::string::npos);
  CHECK(page.size() < 400'000);  // thinned
  dir.file("tune.json",
           "{\"model\": \"\", \"steps\": 2000, \"seconds\": 65.5, \"peak_bytes\": 5000000}");
  const std::string finished = run_report_html(dir.path());
  CHECK(finished.find("Finished after 2000 steps.") != std::string::npos);
  CHECK(finished.find(">peak bytes</th><td>5000000<") != std::string::npos);
  CHECK(finished.find(">model</th>") == std::string::npos);  // there is none
  CHECK(error_from([] { run_report_html("/nowhere"); }).kind() == ErrorKind::not_found);
}
