//! What a finished run says: the exit code that the machine gave, and the report line that must agree
//! with it.

use umbra_report::{ExitCode, Report, ReportError};

use crate::build::Application;
use crate::platform::Ending;

/// The number in the last `exit status N` line of a console. Guests print to the same console, but
/// none prints after Umbra has ended.
pub fn exit_status(console: &str) -> Option<u8> {
    let lines = console.lines().rev();
    lines
        .filter_map(|line| line.trim().strip_prefix("exit status "))
        .find_map(|n| n.parse().ok())
}

/// How a run ended, after the machine's word and Umbra's were compared.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Result {
    /// The exit code of the run.
    pub code: u8,
    /// Umbra's reports, one for each guest, in the order in which they ended.
    pub reports: Vec<Report>,
    /// What is wrong with the run itself, apart from what the guest did.
    pub problem: Option<String>,
}

/// Compares how the machine ended with what the console says, which has `count` reports. Success needs proof
/// on the console, because some machines end with 0 without having run anything.
pub fn judge(ending: Ending, console: &str, application: Application, count: usize) -> Result {
    let reports = reports(console, count);
    let (code, problem) = match (ending, &reports) {
        (Ending::Failed(reason), _) => (ExitCode::GuestFailed.as_u8(), Some(reason)),
        (Ending::Exit(code), _) if application != Application::Umbra => {
            let proven = exit_status(console) == Some(code);
            let problem =
                format!("the run ended with {code}, but no line says `exit status {code}`");
            (code, (!proven).then_some(problem))
        }
        (Ending::Exit(0), Err(error)) => (
            ExitCode::GuestFailed.as_u8(),
            Some(format!("the run ended with 0, but: {error}")),
        ),
        (Ending::Exit(code), Ok(reports)) if first_failure(reports).as_u8() != code => {
            let reported = first_failure(reports);
            let code = if code == 0 {
                reported.as_u8().max(1)
            } else {
                code
            };
            (
                code,
                Some(format!(
                    "the run ended with {code}, but the reports say {reported}"
                )),
            )
        }
        (Ending::Exit(code), _) => (code, None),
    };
    Result {
        code,
        reports: reports.unwrap_or_default(),
        problem,
    }
}

/// The last reports of a console. A lone guest may print lines that look like reports, but none comes
/// after Umbra's; several guests' lines begin with their names.
fn reports(console: &str, count: usize) -> std::result::Result<Vec<Report>, ReportError> {
    let all: Vec<_> = Report::all_from_console(console).collect();
    let first = all.len().checked_sub(count).ok_or(ReportError::Missing)?;
    all.into_iter().skip(first).collect()
}

/// The exit code of the first guest that failed.
fn first_failure(reports: &[Report]) -> ExitCode {
    let codes = reports.iter().map(|report| report.exit_code);
    codes
        .into_iter()
        .find(|&code| code != ExitCode::Success)
        .unwrap_or(ExitCode::Success)
}

#[cfg(test)]
mod tests {
    use umbra_report::Outcome;

    use super::*;

    fn judge(ending: Ending, console: &str) -> Result {
        super::judge(ending, console, Application::Umbra, 1)
    }

    fn console(outcome: Outcome) -> String {
        format!(
            "hello\n{}\nexit status x\n",
            Report::new("hello", outcome, "done").line()
        )
    }

    #[test]
    fn the_last_exit_status_counts() {
        assert_eq!(
            exit_status("exit status 0\nhello\nexit status 6\n"),
            Some(6)
        );
        assert_eq!(exit_status("exit status 0\nexit status x\n"), Some(0));
        assert_eq!(exit_status("the exit status 0\n"), None);
        assert_eq!(exit_status("exit status 300\n"), None);
    }

    #[test]
    fn success_needs_the_report() {
        let success = judge(Ending::Exit(0), &console(Outcome::Succeeded));
        assert_eq!((success.code, success.problem), (0, None));
        let silent = judge(Ending::Exit(0), "hello\n");
        assert_eq!(silent.code, 1);
        assert!(
            silent
                .problem
                .is_some_and(|problem| problem.contains("no UMBRA-REPORT"))
        );
    }

    #[test]
    fn other_applications_need_the_exit_status() {
        let judge = |console| {
            super::judge(Ending::Exit(0), console, Application::LowMemoryCallback, 1)
                .problem
                .is_none()
        };
        assert!(judge("exit status 0\n"));
        assert!(!judge("") && !judge("exit status 1\n"));
    }

    #[test]
    fn a_failure_needs_none() {
        let early = judge(Ending::Exit(2), "umbra-boot: no memory map\n");
        assert_eq!((early.code, early.problem), (2, None));
        assert!(early.reports.is_empty());
    }

    #[test]
    fn contradictions_are_problems() {
        let contradiction = judge(Ending::Exit(0), &console(Outcome::TripleFault));
        assert_eq!(contradiction.code, 6);
        assert!(contradiction.problem.is_some());
    }

    #[test]
    fn several_guests_have_a_report_each() {
        let judge = |code, outcomes: &[Outcome]| {
            let lines = outcomes.iter().map(|&outcome| console(outcome));
            let text: String = lines.collect();
            super::judge(Ending::Exit(code), &text, Application::Umbra, 2)
        };
        let good = judge(6, &[Outcome::Succeeded, Outcome::TripleFault]);
        assert_eq!((good.code, good.problem, good.reports.len()), (6, None, 2));
        assert!(judge(0, &[Outcome::Succeeded]).problem.is_some());
        let hidden = judge(0, &[Outcome::TripleFault, Outcome::Succeeded]);
        assert_eq!(hidden.code, 6);
        assert!(hidden.problem.is_some());
    }

    #[test]
    fn a_killed_machine_is_no_success() {
        let killed = judge(
            Ending::Failed("killed".into()),
            &console(Outcome::Succeeded),
        );
        assert_eq!(
            (killed.code, killed.problem.as_deref()),
            (1, Some("killed"))
        );
    }
}
